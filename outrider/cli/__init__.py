"""Commands and their flags. Importing this package loads no torch, so that ``--help`` and mistakes answer at once."""
