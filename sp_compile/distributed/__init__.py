"""The SP group, what its ranks tell one another, and what they hold and compare. Knows no graph."""
