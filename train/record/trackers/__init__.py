"""Trackers: Weights & Biases, MLflow and Trackio show the numbers of metrics.jsonl, each point once, also after crashes.

metrics.jsonl lines --rows--> one row of scalars for each step --follower (a thread)--> tracker
"""
