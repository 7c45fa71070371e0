"""A run's configuration in the terms of other trainers: tables from parts to settings, one module a trainer."""
