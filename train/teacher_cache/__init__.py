"""`stratum teacher-cache`: compute teacher logits once for every row, so that training needs no teacher."""
