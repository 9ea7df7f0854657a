"""Media: from the parts of a record to placeholders in a row, and from stored bytes to patches and log-mel frames."""
