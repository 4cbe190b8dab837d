"""How much memory a run takes, found out beforehand, and how it is run to fit."""
