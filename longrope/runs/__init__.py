"""What every long run shares: its options, its folder, its journal, progress and plots."""
