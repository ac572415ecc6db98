"""What a compiled graph has around it: its outputs, the settings of Inductor, and the record of what was done."""
