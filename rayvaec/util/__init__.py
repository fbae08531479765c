"""What every part uses: atomic files, locations, locks, progress, messages."""
