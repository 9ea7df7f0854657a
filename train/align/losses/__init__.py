"""Losses of alignment as pure functions of log-probabilities and rewards. They know no model, no ranks and no rows.

Each returns this microbatch's share of the step's loss: a sum divided by the number of pairs, tokens or answers of the whole
step. So the shares of all microbatches and data ranks add up to the same loss, however the step is cut.
"""
