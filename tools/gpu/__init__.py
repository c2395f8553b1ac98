"""The first hour on a GPU: a plan of stages that each leave a record, and the programs that some of them run."""
