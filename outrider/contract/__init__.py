"""What crosses a process boundary: typed wire structures, routes and errors. Imports no torch."""
