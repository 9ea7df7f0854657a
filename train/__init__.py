"""The trainer: assembly and loop on top, tools on a built model below, then the model and what it is made of."""
