"""`stratum teacher-cache`: ask a teacher once for every row, so that training needs no teacher."""
