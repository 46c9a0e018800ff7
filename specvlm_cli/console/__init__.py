"""What people see: messages, progress, tables, safe text."""
