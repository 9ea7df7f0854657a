"""The record of a run: metrics, displays, reports, and a description of its machine."""
