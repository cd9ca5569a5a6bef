"""Studies: questions that are answered once, each by a command that anybody can run again."""
