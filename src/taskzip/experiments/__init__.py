"""The paper's tables and figures (Sec. 4), one file each, run by `taskzip reproduce`."""
