"""What each command of the command line does; `moec.cli` says how they are called."""
