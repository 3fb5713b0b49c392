"""What a pyramid costs and looks like, and what a detector finds: the logic behind the tools."""
