"""Object storage: the door to S3 and Google's storage, and how a run is stored there."""
