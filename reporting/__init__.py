"""What people look at: pictures, trackers, the report page."""
