"""What every room needs of the machine it runs on: acts upon the disk. Standard library only; the bottom of the house's code."""
