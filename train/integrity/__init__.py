"""Detection of silent data corruption: state compared, steps replayed, products and collectives checked by sums."""
