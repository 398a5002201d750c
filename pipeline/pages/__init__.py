"""Pages for people: leaderboard, mistakes, report."""
