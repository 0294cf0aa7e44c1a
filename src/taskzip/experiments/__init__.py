"""The paper's Fig. 2 and Table 1 (Sec. 4.1), and what each step is worth; run by `taskzip reproduce`."""
