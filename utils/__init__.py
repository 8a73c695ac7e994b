"""What the scripts share: utils imports no script, and its modules do not import each other in circles."""
