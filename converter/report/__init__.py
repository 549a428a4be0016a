"""What people see of a conversion: tables and progress on the terminal, JSON in a file."""
