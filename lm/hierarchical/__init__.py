"""AccompGen's hierarchy: vocal semantic -> instrumental semantic -> coarse -> fine acoustic tokens."""
