"""What a model is trained to do on a microbatch: next tokens."""
