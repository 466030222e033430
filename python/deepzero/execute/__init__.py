"""Blocks of perturbations run through a plan, piece by piece, on a CPU or recorded on a device."""
