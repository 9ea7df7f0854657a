"""The recipes (YAML by group) and, in `schema`, what a recipe is and which rules hold for it."""
