"""What seeing and answering costs: shapes to compare, counts, and clocks."""
