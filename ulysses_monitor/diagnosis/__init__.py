"""What rules and policies say of a recorded run; reads runs, writes nothing into them."""
