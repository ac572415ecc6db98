"""Programs for contributors that are no tests: reports, measurements, and faults made on purpose."""
