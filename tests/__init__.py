"""A package, so that `tests` is this folder wherever an installed wheel brings a package of that name (verl's does)."""
