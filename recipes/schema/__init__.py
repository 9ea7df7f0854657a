"""What a run is: typed fields, the rules that span them, and facts derived from a recipe. No torch, no numpy."""
