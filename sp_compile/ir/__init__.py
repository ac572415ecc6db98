"""What passes ask of a graph, what they hand over, and how it is printed."""
