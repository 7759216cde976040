"""The frozen decoder underneath: loading it, checking it, knowing it again, and what touches its inside."""
