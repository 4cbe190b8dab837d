"""The miniature's world: open emoji sets, the same subjects drawn by several houses of artists."""
