"""What a run shows and keeps: metrics, displays, reports, and what its machine is."""
