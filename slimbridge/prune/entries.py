"""Importances of single entries of a weight, for masks."""
