"""The report of a run: one HTML page without network access, made from the files in the run's folder."""
