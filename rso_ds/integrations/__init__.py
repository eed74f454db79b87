"""Adapters to other libraries' training loops. Each module imports its library, so nothing here is imported early."""
