"""Training runs that are measured: what a remote reward costs a step, and how four algorithms learn."""
