"""What a pyramid costs and looks like, and what a trained detector finds: the logic behind the tools."""
