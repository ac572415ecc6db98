"""What a rank holds of one dimension of a value: sizes, layouts, placements, and the arithmetic of their blocks."""
