"""What `anyup app` computes for the page: `folder` are files on disk, `explorer` computes, `server` speaks HTTP."""
