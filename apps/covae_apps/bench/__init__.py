"""`covae bench`: how long Covae takes, beside what else there is; each benchmark in a file, one stopwatch for all."""
