"""Reading and writing of CT volumes. Arrays in memory are in LPS order."""
