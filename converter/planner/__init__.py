"""What a layer costs, what it could cost, and the choice over all layers under one budget."""
