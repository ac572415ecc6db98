"""What looks at models from outside: explain, verify, doctor, and the ranks that they simulate."""
