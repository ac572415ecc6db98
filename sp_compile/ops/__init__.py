"""The `sp::` ops, by which values move between ranks, and what they are made of. They know no graph and no plan."""
