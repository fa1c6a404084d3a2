"""Starting programs on one machine or many: each way runs the same python command in every process."""
